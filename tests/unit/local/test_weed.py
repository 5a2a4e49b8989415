"""The S3 server of a local cluster comes back where jobs know it."""

from dtrain.local.weed import WeedServer
from dtrain.storage.blobs import digest
from dtrain.storage.blobs.open import open_store


def test_a_second_start_in_the_same_folder_keeps_address_and_data(tmp_path, monkeypatch):
    first = WeedServer(tmp_path)
    first.start()
    for name, value in first.env.items():
        monkeypatch.setenv(name, value)
    uri = first.store_uri()
    store = open_store(uri)
    store.put("kept", [b"bytes"], chunk_crcs=[digest.crc32c(b"bytes")])
    store.close()
    first.close()

    second = WeedServer(tmp_path)
    second.start()
    try:
        for name, value in second.env.items():
            monkeypatch.setenv(name, value)
        assert second.store_uri() == uri
        again = open_store(uri)
        assert again.get("kept") == b"bytes"
        again.close()
    finally:
        second.close()

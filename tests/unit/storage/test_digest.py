import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.storage.blobs import digest


def test_crc32c_has_its_published_check_value() -> None:
    assert digest.crc32c(b"123456789") == 0xE3069283
    assert digest.crc32c(b"") == 0


def test_hashing_goes_on_from_a_value_and_over_slices() -> None:
    data = random.Random(1).randbytes(digest.SLICE_BYTES + 3)
    assert digest.crc32c(data[9:], digest.crc32c(data[:9])) == digest.crc32c(data)
    assert digest.crc32c(memoryview(data)) == digest.crc32c(bytearray(data))


@given(st.binary(), st.binary())
def test_combine_is_the_crc_of_both_in_a_row(a: bytes, b: bytes) -> None:
    assert digest.combine(digest.crc32c(a), digest.crc32c(b), len(b)) == digest.crc32c(a + b)


@given(st.binary(max_size=300), st.integers(1, 64))
def test_the_chunks_of_a_blob_give_its_crc(data: bytes, chunk_bytes: int) -> None:
    crcs = [digest.crc32c(data[i : i + chunk_bytes]) for i in range(0, len(data), chunk_bytes)]
    assert digest.full_crc(crcs, len(data), chunk_bytes) == digest.crc32c(data)


def test_lengths_beyond_any_blob_combine() -> None:
    zeros = digest.combine(digest.crc32c(b"x"), digest.combine(0, 0, 1 << 44), 1 << 44)
    twice = digest.combine(digest.combine(digest.crc32c(b"x"), 0, 1 << 43), 0, 1 << 43)
    assert zeros == twice


@pytest.mark.parametrize(("chunks", "length"), [(1, 11), (2, 10), (0, 1), (2, 0), (3, 20)])
def test_chunks_that_do_not_fit_the_length_are_a_bug(chunks: int, length: int) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        digest.full_crc([0] * chunks, length, 10)


@given(st.integers(0, 0xFFFFFFFF))
def test_text_forms_invert(crc: int) -> None:
    assert digest.from_hex(digest.to_hex(crc)) == crc
    assert digest.from_base64(digest.to_base64(crc)) == crc


@pytest.mark.parametrize("text", ["", "12345", "0x345678", "123456789", "zzzzzzzz"])
def test_bad_hex_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        digest.from_hex(text)


@pytest.mark.parametrize("text", ["", "AAAA", "AAAAAA==-3", "!!!!"])
def test_bad_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        digest.from_base64(text)

"""Generated from ``proto/``; never edited. ``dtrain.protocol.wire`` is the only importer besides servicers and stubs."""

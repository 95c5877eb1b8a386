"""What commands stand on: the store of artifacts, options, ranks, files, progress."""

"""What a finished run says: results, page, card, upload."""

"""A preference set, whatever its schema, to one tokenised form."""

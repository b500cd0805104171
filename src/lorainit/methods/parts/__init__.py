"""Mathematics and options that several methods share."""

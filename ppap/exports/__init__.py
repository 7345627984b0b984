"""Networks and masks in the formats of other programs."""

"""Worked examples on top of the product; nothing else imports them."""

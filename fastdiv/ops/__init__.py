"""The public operators.  `call` turns their arguments into a `Request`; nothing below it knows the user."""

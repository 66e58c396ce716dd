"""The live panel, and its plain-line and JSON forms."""

"""What the built-in methods share. Imported by stage files only; nothing else in Tuneline imports torch."""

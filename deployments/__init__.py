"""Everything that starts, joins or describes the servers Tuneline runs on."""

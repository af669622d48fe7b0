"""One file a lifecycle path, and the command line."""

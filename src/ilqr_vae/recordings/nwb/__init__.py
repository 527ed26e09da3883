"""Reading and writing NWB files."""

"""The live page: a process of its own that listens to a service and shows it in a browser."""

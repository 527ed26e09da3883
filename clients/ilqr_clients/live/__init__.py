"""The live page: a separate process that listens to a service and shows it in a browser."""

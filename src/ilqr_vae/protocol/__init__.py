"""What travels between service and clients: messages, keys and clocks."""

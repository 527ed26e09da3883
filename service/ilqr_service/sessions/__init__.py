"""The session table: pure state, with the clock passed in."""

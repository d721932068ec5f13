"""What the command line can do: each command parses, calls and prints; heavy imports wait until it is called."""

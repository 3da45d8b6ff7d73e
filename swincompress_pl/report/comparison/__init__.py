"""The engine beside other runtimes: each one in a process of its own, in turns."""

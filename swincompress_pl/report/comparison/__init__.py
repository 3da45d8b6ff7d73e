"""The engine compared with other runtimes, each in a process of its own, in turns."""

"""What is left after a cut, solved again: closed-form compensation of layers that lose inputs."""

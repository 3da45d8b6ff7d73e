"""Networks as ONNX in other runtimes: exactness, accuracy, speed; see README.md in the folder above."""

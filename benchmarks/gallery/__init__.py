"""The reports of docs/gallery: two of the demo, DeiT-Tiny and a spiking network."""

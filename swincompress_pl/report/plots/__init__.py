"""What a report draws: of a run, of the searches, of a quantized network."""

"""What several tests share: networks, fits, programs, ranks."""

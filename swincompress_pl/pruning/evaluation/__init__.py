"""How a network does on a hold-out: few images per decision, activations kept between candidates, all ranks alike."""

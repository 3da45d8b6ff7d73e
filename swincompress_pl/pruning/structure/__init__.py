"""What can be cut and how: groups and patterns as data, plans, slices, masks, optimizer states, and what is left."""

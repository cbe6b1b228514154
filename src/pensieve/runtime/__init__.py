"""From options to something that answers: finds a model, sizes the tiers, wires worker, scheduler, engine, text and store. Knows all of them; never clients."""

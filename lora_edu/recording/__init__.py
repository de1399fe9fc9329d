"""Makes what ships in data/: trains, tunes, measures and writes rows down. Readers of the course never need it."""

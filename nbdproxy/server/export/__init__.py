"""An export: its recording, its policy and its requests' way, fast and slow."""

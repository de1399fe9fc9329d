"""What makes the recorded data that ships: stages, runs and their analysis. `lora_edu.data` only reads it."""

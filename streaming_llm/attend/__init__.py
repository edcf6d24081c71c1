"""What a pass attends to beside what the layers hold."""

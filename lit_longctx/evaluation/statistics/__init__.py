"""Bootstrap intervals and power laws."""

"""One layer: its matrix, reading and replacing its weight, quantized kinds, sharded tensors, dtypes."""

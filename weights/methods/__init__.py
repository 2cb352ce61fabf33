"""The tensors of methods in the files of other libraries."""

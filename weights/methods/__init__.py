"""Methods in the files of other libraries: one module each, found by discovery.

A module states as `PEFT` how PEFT's files hold the tensors, as `LYCORIS` how LyCORIS's files do, and as `ROWS` which
tensors have one row for each output. A method whose files are this library's own needs no module here.
"""

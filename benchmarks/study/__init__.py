"""How accuracy falls with the batch at a fixed number of epochs, and how narrow the lr that works is: `nox -s study`."""

"""`fluxion demo`: adapters on a digit classifier whose data and weights ship with the package."""

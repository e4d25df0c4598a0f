"""A passive party: its files are named by `flower-supernode --node-config`."""

from overhaul.parties import client_app

app = client_app()

"""Parties: a network split between owners of other columns, who talk through messages alone, in one process or many.

The whole network for those who hold all of it is `parties.model.VerticalModel`, which needs transformers; nothing here does.
"""

from overhaul.parties.flower import Federation as Federation
from overhaul.parties.flower import Processes as Processes
from overhaul.parties.flower import client_app as client_app
from overhaul.parties.flower import party_from as party_from
from overhaul.parties.messages import InProcess as InProcess
from overhaul.parties.messages import Message as Message
from overhaul.parties.messages import PartyLost as PartyLost
from overhaul.parties.party import ActiveParty as ActiveParty
from overhaul.parties.party import PassiveParty as PassiveParty
from overhaul.parties.party import Rates as Rates

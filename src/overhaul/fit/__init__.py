"""Fit: the one training loop, open and closed, its schedules and optimizers, on one process or several."""

from overhaul.fit.checkpoints import TrainingState as TrainingState
from overhaul.fit.combining import Combine as Combine
from overhaul.fit.combining import Combined as Combined
from overhaul.fit.combining import Gradients as Gradients
from overhaul.fit.draws import Draw as Draw
from overhaul.fit.draws import Ledger as Ledger
from overhaul.fit.draws import by_length as by_length
from overhaul.fit.loop import fit as fit
from overhaul.fit.optimizers import OptimizerFactory as OptimizerFactory
from overhaul.fit.optimizers import adamw as adamw
from overhaul.fit.optimizers import sgd as sgd
from overhaul.fit.regime import Regime as Regime
from overhaul.fit.schedules import Infinite as Infinite
from overhaul.fit.schedules import Schedule as Schedule
from overhaul.fit.schedules import learning_rate as learning_rate
from overhaul.fit.step import Step as Step
from overhaul.fit.training import Training as Training

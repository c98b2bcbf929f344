"""Diagnostics of a network: its gates and states, statistics of its units, and the gradient through time.

``python -m jaxlstm.diagnostics --help`` lists the command's options.
"""

from jaxlstm.diagnostics import plots as plots
from jaxlstm.diagnostics.dynamics import FixedPoints as FixedPoints
from jaxlstm.diagnostics.dynamics import fixed_points as fixed_points
from jaxlstm.diagnostics.dynamics import lyapunov_exponents as lyapunov_exponents
from jaxlstm.diagnostics.effective_memory import EffectiveMemory as EffectiveMemory
from jaxlstm.diagnostics.effective_memory import effective_memory as effective_memory
from jaxlstm.diagnostics.explorer import explore as explore
from jaxlstm.diagnostics.gate_statistics import ChosenUnit as ChosenUnit
from jaxlstm.diagnostics.gate_statistics import GateStatistics as GateStatistics
from jaxlstm.diagnostics.gate_statistics import UnitStatistics as UnitStatistics
from jaxlstm.diagnostics.gate_statistics import correlated_units as correlated_units
from jaxlstm.diagnostics.gate_statistics import gate_statistics as gate_statistics
from jaxlstm.diagnostics.gate_statistics import held_out_unit as held_out_unit
from jaxlstm.diagnostics.gradient_advice import GradientAdvice as GradientAdvice
from jaxlstm.diagnostics.gradient_advice import gradient_advice as gradient_advice
from jaxlstm.diagnostics.gradient_flow import GradientFlow as GradientFlow
from jaxlstm.diagnostics.gradient_flow import GradientNorms as GradientNorms
from jaxlstm.diagnostics.gradient_flow import gradient_flow as gradient_flow
from jaxlstm.diagnostics.probe import ProbeAccuracy as ProbeAccuracy
from jaxlstm.diagnostics.probe import ProbeData as ProbeData
from jaxlstm.diagnostics.probe import probe as probe
from jaxlstm.diagnostics.trace import DirectionTrace as DirectionTrace
from jaxlstm.diagnostics.trace import PerDirection as PerDirection
from jaxlstm.diagnostics.trace import Trace as Trace
from jaxlstm.diagnostics.trace import trace as trace

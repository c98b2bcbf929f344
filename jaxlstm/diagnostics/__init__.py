"""Looking inside a network: its gates, its memory, and the gradient on its way back through time.

python -m jaxlstm.diagnostics --help
"""

from jaxlstm.diagnostics.gate_statistics import Memory as Memory
from jaxlstm.diagnostics.gate_statistics import Units as Units
from jaxlstm.diagnostics.gate_statistics import following as following
from jaxlstm.diagnostics.gate_statistics import memory as memory
from jaxlstm.diagnostics.gradient_flow import Flow as Flow
from jaxlstm.diagnostics.gradient_flow import Norms as Norms
from jaxlstm.diagnostics.gradient_flow import gradient_flow as gradient_flow
from jaxlstm.diagnostics.trace import Directions as Directions
from jaxlstm.diagnostics.trace import Steps as Steps
from jaxlstm.diagnostics.trace import Trace as Trace
from jaxlstm.diagnostics.trace import trace as trace
from jaxlstm.experimental.newton_stats import newton_effort as newton_effort

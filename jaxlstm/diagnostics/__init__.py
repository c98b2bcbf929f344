"""Looking inside a network: its gates, its memory, and the gradient on its way back through time.

python -m jaxlstm.diagnostics --help
"""

from jaxlstm.diagnostics.effort import newton_effort as newton_effort
from jaxlstm.diagnostics.flow import Flow as Flow
from jaxlstm.diagnostics.flow import Norms as Norms
from jaxlstm.diagnostics.flow import gradient_flow as gradient_flow
from jaxlstm.diagnostics.memory import Memory as Memory
from jaxlstm.diagnostics.memory import Units as Units
from jaxlstm.diagnostics.memory import following as following
from jaxlstm.diagnostics.memory import memory as memory
from jaxlstm.diagnostics.trace import Directions as Directions
from jaxlstm.diagnostics.trace import Steps as Steps
from jaxlstm.diagnostics.trace import Trace as Trace
from jaxlstm.diagnostics.trace import trace as trace

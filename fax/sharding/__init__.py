"""Programs on many devices: meshes, data on meshes, and several processes."""

from fax.sharding._cpu import use_cpu_devices as use_cpu_devices
from fax.sharding._distributed import initialize as initialize
from fax.sharding._eval_shape import eval_shape as eval_shape
from fax.sharding._mesh import layout as layout
from fax.sharding._mesh import make_mesh as make_mesh
from fax.sharding._place import local_rows as local_rows
from fax.sharding._place import place as place
from fax.sharding._topology import topology as topology

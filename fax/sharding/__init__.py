"""Programs on many devices: meshes, data on meshes, and several processes."""

from fax.sharding._mesh import layout as layout
from fax.sharding._mesh import make_mesh as make_mesh

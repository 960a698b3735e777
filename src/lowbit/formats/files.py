from ..stream.shards import *

from ..stream.source import *

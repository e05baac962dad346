"""Questions to a Genescale service, from any Python: needs httpx and numpy, no torch and no Ray.

from genescale.client import GenescaleClient

with GenescaleClient("http://127.0.0.1:8000", api_key=key) as client:
    answer = client.embeddings([{"counts": {"GATA4": 3, "TTN": 41}}])
    print(answer.embeddings.shape, answer.model.version)
"""

from genescale.client.asynchronous import AsyncGenescaleClient as AsyncGenescaleClient
from genescale.client.cells import Cell as Cell
from genescale.client.jobs import Job as Job
from genescale.client.jobs import JobsPage as JobsPage
from genescale.client.progress_bar import ProgressBar as ProgressBar
from genescale.client.records import CellGenes as CellGenes
from genescale.client.records import CellReport as CellReport
from genescale.client.records import CellTokens as CellTokens
from genescale.client.records import ClassifiedCell as ClassifiedCell
from genescale.client.records import ClassifiedGene as ClassifiedGene
from genescale.client.records import ClassifyAnswer as ClassifyAnswer
from genescale.client.records import EditResult as EditResult
from genescale.client.records import EmbeddedCells as EmbeddedCells
from genescale.client.records import EmbeddingsAnswer as EmbeddingsAnswer
from genescale.client.records import GeneEmbeddingsAnswer as GeneEmbeddingsAnswer
from genescale.client.records import GeneShift as GeneShift
from genescale.client.records import HeadAnswer as HeadAnswer
from genescale.client.records import LabelVote as LabelVote
from genescale.client.records import Model as Model
from genescale.client.records import Neighbor as Neighbor
from genescale.client.records import NeighborsAnswer as NeighborsAnswer
from genescale.client.records import NeighborsCell as NeighborsCell
from genescale.client.records import NeighborsReference as NeighborsReference
from genescale.client.records import PerturbationsAnswer as PerturbationsAnswer
from genescale.client.records import PerturbedCell as PerturbedCell
from genescale.client.records import Timings as Timings
from genescale.client.records import TokensAnswer as TokensAnswer
from genescale.client.records import TopGeneShift as TopGeneShift
from genescale.client.sources import cells_of as cells_of
from genescale.client.sync import GenescaleClient as GenescaleClient

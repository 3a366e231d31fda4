import torch

# Results do not depend on the machine's core count, and tests run side by side do not fight.
torch.set_num_threads(1)

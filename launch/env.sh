# Environment of every rank.  Source it before torchrun; a value that is already set is kept.
# `zj launch` sets the same ones.

# torch 2.13: a node that dies and comes back hangs both agents in the rendezvous, because the agent that stayed shares
# the store of the first round and never publishes the address for the next.  With its own store it rejoins in 20 s.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

# One hardware queue: kernels start in the order in which they were launched, so that a tensor-parallel collective is
# under way before the product that is to hide it (needed before Blackwell; harmless after).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Packs have a different length at every step; growing segments instead of allocating new ones avoids fragmentation.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Not set here, because only you know the network:
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   the interface that reaches the other nodes, when there are several
#   NCCL_IB_HCA                              the InfiniBand cards to use
# Not set here, because the default is right:
#   OMP_NUM_THREADS                          the program divides the node's cores among its ranks
#   TORCH_NCCL_ASYNC_ERROR_HANDLING          a collective that fails or times out ends the process
# Every process group has an explicit timeout: run.timeout_seconds.

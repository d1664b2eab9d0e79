// Found instead of CUDA's own: simt.h has what it defines.

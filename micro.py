import torch,time
import maskmoe_kernels as mk
torch.set_num_threads(1)
fam = mk.SubsetFamily({"a":4,"b":4},{"a":["a"],"b":["b"],"ab":["a","b"]})
net = mk.InterpretableMLP(fam, hidden=[16,16])
x = torch.randn(256, 8)
def t(name,f,n=300):
    best=9e9
    for _ in range(30):
        s=time.thread_time()
        for _ in range(n): f()
        best=min(best,(time.thread_time()-s)/n*1e6)
    print(name,"%.2f"%best)
call=net.layers.fused(x)
op=torch.ops.maskmoe.masked_mlp.default
t("fused",lambda: net.layers.fused(x))
t("_arguments",lambda: net.layers._arguments())
with torch.no_grad():
  t("op list",lambda: op(*call,True))
  tens=(*call.weights,*call.biases)
  c2=call.with_tensors(x,tens)
  t("op tuple",lambda: op(*c2,True))
  t("op False",lambda: op(*c2,False))
  t("with", lambda: call.with_tensors(x,tens))

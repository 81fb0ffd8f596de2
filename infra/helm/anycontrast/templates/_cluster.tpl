{{/* The Ray cluster, used by the RayCluster and by the RayJob with a cluster of its own. */}}

{{- define "anycontrast.clusterSpec" -}}
rayVersion: {{ .Values.ray.version | quote }}
authOptions:
  mode: {{ .Values.auth.mode | quote }}
  {{- with .Values.auth.existingSecret }}
  secretName: {{ . | quote }}
  {{- end }}
{{- if and (ne .Values.mode "job") (eq .Values.upgrade.strategy "Recreate") }}
upgradeStrategy:
  type: Recreate
{{- end }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- if .Values.autoscaling.enabled }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ .Values.autoscaling.idleTimeoutSeconds | int }}
  upscalingMode: {{ .Values.autoscaling.upscalingMode | quote }}
  resources:
    {{- include "anycontrast.resources" .Values.autoscaling | nindent 4 }}
  securityContext:
    {{- include "anycontrast.securityContext" (dict "root" .) | nindent 4 }}
  {{- if eq .Values.auth.mode "disabled" }}
  # The image asks for a token; with tokens the operator sets this itself.
  env:
    - {name: RAY_AUTH_MODE, value: disabled}
  {{- end }}
  # KubeRay mounts /tmp/ray only, and HOME and all caches of the image lie under /tmp.
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    dashboard-host: 0.0.0.0
    # No task or training process is placed on the head; drivers of jobs are.
    num-cpus: "0"
    object-store-memory: {{ include "anycontrast.objectStoreBytes" .Values.head.sharedMemory | quote }}
  template:
    {{- include "anycontrast.headPod" . | nindent 4 }}
workerGroupSpecs:
  {{- range $name, $group := include "anycontrast.groups" . | fromJson }}
  - groupName: {{ $name | quote }}
    {{- if $.Values.autoscaling.enabled }}
    # No number of replicas: the autoscaler owns it, and an upgrade must not put it back.
    minReplicas: {{ $group.minReplicas | int }}
    maxReplicas: {{ $group.maxReplicas | int }}
    {{- else }}
    replicas: {{ $group.replicas | int }}
    minReplicas: {{ $group.replicas | int }}
    maxReplicas: {{ $group.replicas | int }}
    {{- end }}
    rayStartParams:
      object-store-memory: {{ include "anycontrast.objectStoreBytes" $group.sharedMemory | quote }}
    template:
      {{- include "anycontrast.workerPod" (dict "root" $ "name" $name "group" $group) | nindent 6 }}
  {{- end }}
{{- end -}}

{{/* What head and workers share beside the containers. */}}
{{- define "anycontrast.podBasics" -}}
securityContext:
  {{- include "anycontrast.podSecurityContext" . | nindent 2 }}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- with include "anycontrast.schedulerName" . }}
schedulerName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "anycontrast.headPod" -}}
{{- $head := .Values.head -}}
{{- $gang := include "anycontrast.schedulingPodLabels" . | fromYaml -}}
{{- $context := dict "root" . "component" "head" -}}
metadata:
  labels:
    {{- include "anycontrast.podLabels" (dict "root" . "component" "head" "extra" (merge $gang $head.labels)) | nindent 4 }}
  annotations:
    cluster-autoscaler.kubernetes.io/safe-to-evict: {{ $head.safeToEvict | quote }}
    {{- with merge (deepCopy $head.annotations) .Values.pods.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "anycontrast.podBasics" . | nindent 2 }}
  serviceAccountName: {{ include "anycontrast.serviceAccountName" $context | quote }}
  # Only the autoscaler asks the Kubernetes API.
  automountServiceAccountToken: {{ .Values.autoscaling.enabled }}
  {{- with $head.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $head.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $head.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-head
      image: {{ include "anycontrast.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy | quote }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: metrics, containerPort: 8080}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
      env:
        {{- include "anycontrast.env" $context | nindent 8 }}
      securityContext:
        {{- include "anycontrast.securityContext" $context | nindent 8 }}
      resources:
        {{- include "anycontrast.resources" $head | nindent 8 }}
      volumeMounts:
        {{- include "anycontrast.volumeMounts" $context | nindent 8 }}
        {{- if ne .Values.mode "cluster" }}
        {{- if .Values.job.inlineConfig }}
        - name: job-config
          mountPath: /etc/anycontrast
          readOnly: true
        {{- end }}
        {{- end }}
    {{- if .Values.logs.sidecar }}
    {{- include "anycontrast.logSidecar" . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "anycontrast.volumes" (dict "root" . "component" "head" "sharedMemory" $head.sharedMemory "ephemeralStorage" $head.ephemeralStorage) | nindent 4 }}
    {{- if ne .Values.mode "cluster" }}
    {{- if .Values.job.inlineConfig }}
    - name: job-config
      configMap:
        name: {{ include "anycontrast.jobName" . | quote }}
    {{- end }}
    {{- end }}
{{- end -}}

{{/* A worker: (dict "root" $ "name" GROUP_NAME "group" MERGED_GROUP). */}}
{{- define "anycontrast.workerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $context := dict "root" $root "component" "worker" -}}
{{- $own := dict "app.kubernetes.io/component" "worker" "anycontrast/group" .name -}}
{{- $gang := include "anycontrast.schedulingPodLabels" $root | fromYaml -}}
{{- $annotations := merge (include "anycontrast.fabricAnnotations" $root | fromYaml) $group.annotations $root.Values.pods.annotations -}}
{{- $gpu := dict $group.gpus.resourceName (toString ($group.gpus.count | int)) -}}
{{- $devices := merge $gpu (include "anycontrast.fabricResources" $root | fromYaml) -}}
{{- $disk := include "anycontrast.ephemeralStorage" (merge (dict "ephemeralStorage" $group.ephemeralStorage) $context) -}}
{{- $nodeSelector := deepCopy $group.nodeSelector -}}
{{- with $group.gpus.product }}{{ $_ := set $nodeSelector $group.gpus.productLabel . }}{{ end -}}
metadata:
  labels:
    {{- include "anycontrast.podLabels" (dict "root" $root "component" "worker" "extra" (merge $own $gang $group.labels)) | nindent 4 }}
  {{- with $annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "anycontrast.podBasics" $root | nindent 2 }}
  serviceAccountName: {{ include "anycontrast.serviceAccountName" $context | quote }}
  automountServiceAccountToken: false
  {{- if $root.Values.drain.enabled }}
  terminationGracePeriodSeconds: {{ add ($root.Values.drain.deadlineSeconds | int) ($root.Values.drain.marginSeconds | int) }}
  {{- end }}
  {{- if eq $root.Values.network.fabric "hostNetwork" }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with $nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  tolerations:
    - key: {{ $group.gpus.resourceName | quote }}
      operator: Exists
      effect: NoSchedule
    {{- with $group.tolerations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- $selector := dict "matchLabels" (merge (dict "anycontrast/group" $.name) (include "anycontrast.selectorLabels" $root | fromYaml)) }}
    {{- range . }}
    - {{- toYaml (merge (deepCopy .) (dict "labelSelector" $selector)) | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray-worker
      image: {{ include "anycontrast.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy | quote }}
      ports:
        - {name: metrics, containerPort: 8080}
      env:
        {{- include "anycontrast.env" $context | nindent 8 }}
        {{- include "anycontrast.fabricEnv" $root | nindent 8 }}
        {{- with $group.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if $root.Values.drain.enabled }}
      lifecycle:
        preStop:
          exec:
            command:
              - /bin/bash
              - -c
              - |
                {{- include "anycontrast.drainScript" $root | nindent 16 }}
      {{- end }}
      securityContext:
        {{- include "anycontrast.securityContext" (dict "root" $root "capabilities" (include "anycontrast.fabricCapabilities" $root)) | nindent 8 }}
      resources:
        {{- include "anycontrast.resources" (dict "cpu" $group.cpu "memory" $group.memory "ephemeralStorage" $disk "more" $devices) | nindent 8 }}
      volumeMounts:
        {{- include "anycontrast.volumeMounts" $context | nindent 8 }}
    {{- if $root.Values.logs.sidecar }}
    {{- include "anycontrast.logSidecar" $root | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "anycontrast.volumes" (merge (dict "sharedMemory" $group.sharedMemory "ephemeralStorage" $group.ephemeralStorage) $context) | nindent 4 }}
{{- end -}}

{{/* Runs before a worker ends: tells Ray to drain this node as if it were preempted, so that the
trainer checkpoints at once, and waits until no training process is left or the time is up. */}}
{{- define "anycontrast.drainScript" -}}
end=$((SECONDS + {{ .Values.drain.deadlineSeconds | int }}))
timeout {{ .Values.drain.deadlineSeconds | int }} ray drain-node \
  --reason DRAIN_NODE_REASON_PREEMPTION \
  --reason-message "the pod of this worker is ending" \
  --deadline-remaining-seconds {{ .Values.drain.deadlineSeconds | int }} \
  || { echo "drain refused; the run resumes from its newest checkpoint" >&2; exit 0; }
# Idle workers and Ray's own agents are no training processes.
trains() {
  grep -ahosE '^ray::[A-Za-z_]+' /proc/[0-9]*/cmdline | grep -qvE '^ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'
}
while [ "$SECONDS" -lt "$end" ] && trains; do
  sleep 1
done
{{- end -}}
